package android.content.res;

public final class AssetManager {
    public static final int ACCESS_STREAMING = 2;

    public native String[] list(String path) throws java.io.IOException;

    public native java.io.InputStream open(String fileName, int accessMode) throws java.io.IOException;
}

package android.content;

public abstract class Context {
    public abstract android.content.res.AssetManager getAssets();

    public abstract Context getApplicationContext();

    public abstract java.io.File getFilesDir();

    public final native <T> T getSystemService(Class<T> serviceClass);

    public final native String getString(int resId);
}

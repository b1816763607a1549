package android.view;

public abstract class Window {
    public native void addFlags(int flags);

    public native void clearFlags(int flags);
}

package android.content;

public class Intent {
    public Intent() {}

    public native boolean getBooleanExtra(String name, boolean defaultValue);

    public native int getIntExtra(String name, int defaultValue);

    public native String getStringExtra(String name);
}

package android.app;

import android.content.Context;
import android.content.Intent;

public abstract class Activity extends Context implements android.content.ComponentCallbacks2 {
    public Activity() {}

    protected native void onCreate(android.os.Bundle savedInstanceState);

    protected native void onStart();

    protected native void onStop();

    protected native void onDestroy();

    protected native void onNewIntent(Intent intent);

    public native void onTrimMemory(int level);

    public native void setContentView(int layoutResID);

    public native <T extends android.view.View> T findViewById(int id);

    public native Intent getIntent();

    public native android.view.Window getWindow();

    public native android.content.res.AssetManager getAssets();

    public native Context getApplicationContext();

    public native java.io.File getFilesDir();
}

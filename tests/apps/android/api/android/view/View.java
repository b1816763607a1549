package android.view;

public class View {
    public static final int FOCUS_DOWN = 130;
    public static final int GONE = 8;
    public static final int VISIBLE = 0;

    public native void setOnClickListener(OnClickListener l);

    public native void setVisibility(int visibility);

    public native int getVisibility();

    public native void setEnabled(boolean enabled);

    public native boolean isEnabled();

    public native boolean post(Runnable action);

    public interface OnClickListener {
        void onClick(View v);
    }
}

package android.widget;

public class TextView extends android.view.View {
    public final native void setText(CharSequence text);

    public native CharSequence getText();

    public native CharSequence getHint();

    public native int length();
}

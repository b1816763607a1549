package android.widget;

public class EditText extends TextView {
    public native android.text.Editable getText();
}

package android.os;

import android.system.ErrnoException;
import java.nio.ByteBuffer;

public final class SharedMemory implements java.io.Closeable {
    public static native SharedMemory create(String name, int size) throws ErrnoException;

    public native ByteBuffer mapReadWrite() throws ErrnoException;

    public static native void unmap(ByteBuffer buffer);

    public native void close();
}

"""One package a runtime, each behind one `Session`."""

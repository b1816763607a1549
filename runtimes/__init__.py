"""One file a runtime behind one `Session`. What may enter: `bundle`."""

"""Sound: files read as samples, and samples as what an encoder reads. No torch is imported."""

"""A bundle measured on a device that is not this process's machine: the way there, what runs there, and what comes back."""

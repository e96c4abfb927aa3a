"""Scripts that measure llama4q and print tables; not part of the installed package."""

"""What the commands do, without the command line: each is a function that returns a value."""

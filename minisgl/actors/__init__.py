"""The actor runtime and the actors: processes that own state and talk by messages."""

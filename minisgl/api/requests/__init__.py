"""Request bodies: JSON in, checked and typed requests out."""

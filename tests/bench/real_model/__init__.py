"""Methods beside each other on a real instruct model: PROTOCOL.md says what is compared and how."""

"""Input lines to prompts: sources are read, lines become records, chats are rendered to tokens."""

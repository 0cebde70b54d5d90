"""How a base model is read: supported families, their readers, and the check of each reader."""

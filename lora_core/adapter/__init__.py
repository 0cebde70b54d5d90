"""An adapter's files: PEFT's format with an identity beside it, loaded strictly; and other programs' formats."""

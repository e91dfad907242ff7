"""The commands, which import torch only when a command needs it."""

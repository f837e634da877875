"""Data: real handwriting composed into scenes, readers of images and videos, tokenizers, and the Grain
stream."""

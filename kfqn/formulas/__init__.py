"""The mathematics: pure functions of tensors and numbers, equation by equation."""

"""Run git on this computer's repositories without executing anything from them."""

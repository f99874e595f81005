"""Videos from a trained student: which weights, which prompts and starts, and the loop that makes and writes them."""

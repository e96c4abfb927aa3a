"""The commands of llama4q: parse, one call, print. Heavy imports happen inside them."""

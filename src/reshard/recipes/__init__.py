"""The recipe language: what a recipe says, read and checked. Looks at no checkpoint. The recipes lie in `families`."""

"""How a sparse parameter is stored; each layout offers methods a `Leaf`."""

"""DeepSpeed behind one interface: a step, an evaluation, state by name; optimisers and compiled blocks."""

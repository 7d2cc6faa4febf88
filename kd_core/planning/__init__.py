"""Plans: what a run would find, compute, store and cost, said before it does any of it."""

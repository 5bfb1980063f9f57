"""Tools that agents call: which credential may call which, and what exactly an approval is bound to."""

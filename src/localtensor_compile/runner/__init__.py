"""A program per rank: one thread per rank in this process, exactly one of which runs at a time.

- `scheduler`: who runs; deadlocks; stopping.
- `exchange`: which calls of the ranks belong together, and what they wait for.
- `process_group`: the c10d process group of a rank's thread, which hands its calls to the exchange.
- `engine`: the three put together: `run_ranks(world_size, fn)`.
- `mode`: LocalRunnerMode, the public API. `job`: `localtensor run`.

How to record what ranks call: `Engine(size, observers=[f])`, then `engine.run(fn)`; each `f(call)`
gets an `exchange.Call` (rank, kind, group, arguments, tensors, user's line) as it is launched, in
the order of the (seeded) interleaving.
"""

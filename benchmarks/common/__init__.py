"""What measurements share: machine, shapes, tensors, policies as measured, timers, rounds. Imports only the package."""

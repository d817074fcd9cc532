"""Shared parts of the measurements: machine, shapes, tensors, measured policies, timers, rounds. Imports only the
package.
"""

"""The examples of every task: official XGLUE data, and the stand-ins in ../data."""

"""The demo: a small multilingual transformer learns from English and is tested in eight other languages."""

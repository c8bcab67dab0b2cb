"""One file for each worker class: how it stops accepting, drains and accepts again."""

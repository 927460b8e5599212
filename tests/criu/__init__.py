"""CRIU's side, written a second time: images, a restorer and a page server that share no code with
what is tested."""

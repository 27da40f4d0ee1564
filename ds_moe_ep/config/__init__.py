"""Every knob and every key, checked before anything is built."""

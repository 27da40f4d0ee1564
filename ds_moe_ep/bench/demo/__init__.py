"""The first minute: one layer on an emulated link, serial beside overlapped, and the end of a rank."""

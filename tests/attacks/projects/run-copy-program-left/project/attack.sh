echo '@SH@' >.envrc

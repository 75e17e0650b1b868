//! Matrix products on the CPU, with one order of sums.

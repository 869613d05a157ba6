"""Rows and views to pixels, on threads of the CPU or by DALI."""

"""Policies that answer: one decoder, and the engines that offer it or another."""

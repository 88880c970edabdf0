"""Distillation: a network learns from a trained one, on pictures without labels."""
from .networks import Answer, Teacher, load_teacher
from .training import Settings, Size, distill

__all__ = ['Answer', 'Settings', 'Size', 'Teacher', 'distill', 'load_teacher']

"""Distillation: a SAN learns from a trained network on pictures without labels."""
from .networks import Answer, Student, Teacher, load_teacher
from .pictures import Files, Store, Views
from .training import Settings, Size, distill

__all__ = ['Answer', 'Files', 'Settings', 'Size', 'Store', 'Student', 'Teacher', 'Views', 'distill', 'load_teacher']

"""Distillation: a network learns from a trained one on pictures without labels."""
from .networks import Answer, Standardised, Student, Teacher, load_teacher
from .pictures import Files, Store, Views
from .training import WEIGHTS, Settings, Size, distill

__all__ = ['WEIGHTS', 'Answer', 'Files', 'Settings', 'Size', 'Standardised', 'Store', 'Student', 'Teacher', 'Views',
           'distill', 'load_teacher']

"""Draws the CSVs of `results/` as PNGs beside them.

    python benchmarks/plot.py
"""
import csv
import sys
import textwrap

import harness
import matplotlib
import table

matplotlib.use('Agg')
import matplotlib.pyplot as plt


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def finish(figure, path, machine):
    lines = textwrap.wrap(machine, int(17 * figure.get_figwidth()))
    figure.text(0.01, 0.005, '\n'.join(lines), fontsize=7, color='0.4')
    figure.tight_layout(rect=(0, 0.03 * max(1, len(lines)), 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f'wrote {path}')


def models(path):
    """Draws throughput and memory relative to resnet50's, for every model and setting."""
    rows = read(path)
    settings = list(dict.fromkeys(row['setting'] for row in rows))
    heights = [sum(row['setting'] == setting for row in rows) for setting in settings]
    figure, axes = plt.subplots(len(settings), 2, figsize=(11, 0.6 + 0.34 * len(rows)), squeeze=False,
                                gridspec_kw=dict(height_ratios=heights))
    for (left, right), setting in zip(axes, settings):
        some = [row for row in rows if row['setting'] == setting][::-1]
        labels = [row['model'] for row in some]
        colours = ['0.6' if not label.startswith('san') else '#b04a3a' if ' reference' in label or ' compiled' in label
                   else '#2f6f8f' for label in labels]
        for axis, column, what in ((left, 'throughput_to_resnet50', 'throughput, resnet50 = 1'),
                                   (right, 'peak_to_resnet50', 'peak memory, resnet50 = 1')):
            values = [float(row[column] or 'nan') for row in some]
            axis.barh(labels, values, color=colours)
            axis.axvline(1, color='black', linewidth=0.8)
            for y, value in enumerate(values):
                if value == value:
                    axis.text(value, y, f' {value:.2f}', va='center', fontsize=7)
            axis.set_xlim(0, 1.15 * max([1., *(v for v in values if v == v)]))
            axis.set_title(f'{setting}: {what}', fontsize=8, loc='left')
            axis.tick_params(labelsize=7)
            axis.spines[['top', 'right']].set_visible(False)
        right.set_yticklabels([])
    finish(figure, path.with_suffix('.png'), rows[0]['machine'])


def operators(path):
    """Draws the time of every layer by every path, and its floor."""
    rows = [row for row in read(path) if not row['layer'].startswith('SAN15')]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharey=True)
    for axis, (form, what) in zip(axes.flat, dict.fromkeys((row['form'], row['what']) for row in rows)):
        some = [row for row in rows if (row['form'], row['what']) == (form, what)]
        for i, (column, label, colour) in enumerate((
                ('reference_ms', 'plain definition', '#b04a3a'), ('compiled_ms', 'its torch.compile', '#d9a441'),
                ('ours_ms', 'ours', '#2f6f8f'), ('floor_ms', 'floor', '0.7'))):
            values = [float(row[column] or 'nan') for row in some]
            if any(value == value for value in values):
                axis.bar([x + 0.2 * i - 0.3 for x in range(len(some))], values, 0.2, label=label, color=colour)
        axis.set_yscale('log')
        axis.set_xticks(range(len(some)), [row['layer'].replace(', ', '\n', 1) for row in some], fontsize=7)
        axis.set_title(f'{form}, {what}', fontsize=9, loc='left')
        axis.spines[['top', 'right']].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel('milliseconds')
    axes[0, 0].legend(fontsize=8, frameon=False)
    finish(figure, path.with_suffix('.png'), rows[0]['machine'])


def growth(path):
    """Draws time and memory against the number of pixels; a straight line through the origin is linear growth."""
    rows = read(path)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5))
    for axis_row, what in zip(axes, dict.fromkeys(row['what'] for row in rows)):
        for axis, column, label in zip(axis_row, ('milliseconds', 'peak_megabytes'), ('milliseconds', 'peak, MB')):
            for name in dict.fromkeys(row['model'] for row in rows):
                some = [row for row in rows if (row['what'], row['model']) == (what, name)]
                axis.plot([int(row['side']) ** 2 / 1e6 for row in some], [float(row[column]) for row in some], 'o-',
                          markersize=3, label=name, color='0.6' if name == 'resnet50' else None)
            axis.set_xlim(0)
            axis.set_ylim(0)
            axis.set_xlabel('megapixels')
            axis.set_title(f'{what}: {label}', fontsize=9, loc='left')
            axis.spines[['top', 'right']].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    finish(figure, path.with_suffix('.png'), rows[0]['machine'])


def learning(path):
    """Draws the score on validation pictures against steps and processor time."""
    rows = read(path)
    score = next(name for name in rows[0] if name in ('mIoU', 'bbox_mAP'))
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 3.6), sharey=True)
    for row in rows:
        if row.get('weights', 'random') != 'random':
            row['backbone'] += f' from {row["weights"]}'
    for name in dict.fromkeys(row['backbone'] for row in rows):
        some = [row for row in rows if (row['backbone'], row['pictures']) == (name, 'validation')]
        some = [row for row in some if row['seed'] == some[0]['seed']]
        for axis, column, label in zip(axes, ('iteration', 'cpu_seconds'), ('steps', 'processor time in training, s')):
            axis.plot([float(row[column]) for row in some], [float(row[score]) for row in some], 'o-', markersize=3,
                      label=f'{name}, {some[0]["backbone_parameters"]}', color='0.6' if name == 'resnet50' else None)
            axis.set_xlabel(label)
            axis.spines[['top', 'right']].set_visible(False)
    for axis in axes:  # last: earlier, the limits would be fixed by the first curve
        axis.set_xlim(0)
        axis.set_ylim(0)
    axes[0].set_ylabel(f'{score}, {rows[0]["task"]} validation')
    axes[1].legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, .5))
    finish(figure, path.with_suffix('.png'), '; '.join(dict.fromkeys(row['machine'] for row in rows)))


def transfer(path):
    """Draws scores against pictures seen in the distillation; random weights and teachers as horizontal lines."""
    rows = [row for row in read(path) if row['size'] == '64' and not row['network'].endswith(('int8', 'bfloat16'))]
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.6))
    for axis, column, label in zip(axes, ('top1', 'knn'), ('zero-shot top-1, %', 'kNN on Imagenette, %')):
        for name in dict.fromkeys(row['network'] for row in rows):
            some = sorted((float(row['pictures'] or 0), float(row[column])) for row in rows
                          if row['network'] == name and row[column])
            if len(some) == 1 or name.endswith('random'):
                for _, value in some[:1]:
                    axis.axhline(value, label=name, color='0.6', linestyle='--' if name.endswith('random') else ':')
            elif some:
                axis.plot(*zip(*some), 'o-', markersize=3, label=name)
        axis.set_xlabel('pictures seen in the distillation')
        axis.set_ylabel(label)
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_ylim(0)
    axes[1].legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, .5))
    finish(figure, path.with_suffix('.png'), '; '.join(dict.fromkeys(row['machine'] for row in rows)))


def extract(path):
    """Memory against the number of pictures: a level line is what a stream needs."""
    rows = read(path)
    if 'peak_megabytes' not in rows[0]:
        return
    figure, axis = plt.subplots(figsize=(6, 3.6))
    pictures, peaks = zip(*((int(row['pictures']), float(row['peak_megabytes'])) for row in rows))
    axis.plot(pictures, peaks, 'o-', markersize=3)
    axis.set_xscale('log')
    axis.set_ylim(0, 1.1 * max(axis.get_ylim()))
    axis.set_xlabel('pictures')
    axis.set_ylabel('highest resident size, MB')
    axis.spines[['top', 'right']].set_visible(False)
    finish(figure, path.with_suffix('.png'), rows[0]['machine'])


COLOURS = dict(san10_pairwise='#2f6f8f', san10_patchwise='#b04a3a', resnet26='0.6', resnet50='0.3')


def comparison(path):
    """Draws, for each setting, accuracy on held-out pictures against epochs and time, one line a seed of a network as
    the package has it, and the top-1 of each change on val.
    """
    rows = read(path)
    groups = list(table.settings(rows))
    heights = [max(3.2, 0.15 * len(set(table.labels(some)))) for _, some in groups]
    figure, axes = plt.subplots(len(groups), 3, figsize=(13, sum(heights) + len(groups)), squeeze=False,
                                gridspec_kw=dict(height_ratios=heights))
    for (left, middle, right), (words, some) in zip(axes, groups):
        labels = table.labels(some)
        plain = [row for label, row in zip(labels, some) if not label]
        for i, row in enumerate(plain):
            label = row['model'] if row['model'] not in [other['model'] for other in plain[:i]] else None
            curve = [float(value) for value in row['held_out'].split()]
            colour = COLOURS.get(row['model'])
            left.plot(range(1, len(curve) + 1), curve, 'o-', markersize=3, label=label, color=colour)
            middle.plot([float(value) for value in row['seconds'].split()], curve, 'o-', markersize=3, color=colour)
        changes = sorted(set(labels), reverse=True)
        for label, row in zip(labels, some):
            right.plot(float(row['top1']), changes.index(label), 'o', color=COLOURS.get(row['model']))
        right.set_yticks(range(len(changes)), [change or 'as the package has it' for change in changes], fontsize=7)
        right.set_xlabel('top-1 on val, %')
        right.set_xlim(0, 1.08 * max(float(row['top1']) for row in some))
        left.set_ylabel('top-1 on held-out pictures, %')
        left.set_xlabel('epochs')
        middle.set_xlabel('time in training, s')
        left.set_title(words, fontsize=8, loc='left')
        left.legend(fontsize=8, frameon=False)
        for axis in (left, middle, right):
            axis.spines[['top', 'right']].set_visible(False)
        for axis in (left, middle):
            axis.set_xlim(0)
            axis.set_ylim(0)
    finish(figure, path.with_suffix('.png'), '; '.join(dict.fromkeys(row['machine'] for row in rows)))


PLOTS = dict(models=models, operators=operators, growth=growth, learning=learning, transfer=transfer, extract=extract,
             table=comparison)


def main():
    paths = sorted(harness.RESULTS.glob('*.csv'))
    for path in paths:
        kind = path.stem.partition('-')[0]
        if kind in PLOTS:  # not the CSV of a single size
            PLOTS[kind](path)
    if not paths:
        sys.exit(f'no CSV in {harness.RESULTS}: run models.py, operators.py, growth.py or learning.py first')


if __name__ == '__main__':
    main()

/* The inner loops of lookahead.py and gptq.py, for LANES outputs at a time.

kernel.py compiles this file for one grid (FLOAT8: E4M3, else integers from `least` to `most`) and
one number of BEAMS, so that all loops over beams have a constant length. Outputs do not depend on
each other: lanes never meet, and what one lane needs is computed by all, without branches. */

#include <math.h>
#include <string.h>

enum { STRIP = 16 }; /* rows between two large products */

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));
typedef int Words __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));
typedef struct { _Alignas(4 * LANES) float at[LANES]; } Row;
typedef struct { _Alignas(4 * LANES) float at[BEAMS][LANES]; } Floats; /* one row of all beams */
typedef struct { _Alignas(4 * LANES) int at[BEAMS][LANES]; } Ints;
typedef struct { float least, most; } Grid;

#define EACH_BEAM for (int beam = 0; beam < BEAMS; beam++)
#define EACH_LANE for (int lane = 0; lane < LANES; lane++)
#define ALWAYS static inline __attribute__((always_inline))

ALWAYS int bits_of(float value) { int bits; memcpy(&bits, &value, 4); return bits; }
ALWAYS float float_of(int bits) { float value; memcpy(&value, &bits, 4); return value; }

/* Scheme.nearest: ties to even, saturating. */
ALWAYS float nearest(float value, Grid grid) {
    value = value < grid.least ? grid.least : value;
    value = value > grid.most ? grid.most : value;
    if (!FLOAT8) return rintf(value);
    int bits = bits_of(value);
    float normal = float_of((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF);
    float subnormal = rintf(value * 512) / 512; /* below 2^-5 codes are 2^-9 apart */
    return fabsf(value) < 0x1p-6f ? subnormal : normal;
}

/* Scheme.second_nearest: the code on the other side of `value`, or `near` at the grid's end. */
ALWAYS float second_nearest(float value, float near, Grid grid) {
    float up = value > near ? 1 : -1, second = near + up;
    if (FLOAT8) {
        int next = bits_of(near) + (near * up > 0 ? 0x100000 : -0x100000);
        second = fabsf(near) < 0x1p-5f ? near + up * 0x1p-9f : float_of(next);
    }
    return second < grid.least || second > grid.most ? near : second;
}

/* to[beam] = from[which[beam]], lane by lane. PICK, which kernel.py writes for this number of beams,
   is a tree of selections, one level for each bit of `which`: half the time of gather loads. */
ALWAYS void pick(void *to, const void *from, const Ints *which) {
    Words found[BEAMS];
    EACH_BEAM {
        Words name = *(const Words *)which->at[beam], left[BEAMS];
        memcpy(left, from, sizeof left);
#define SELECT(one, other, bit) left[one] ^= (left[one] ^ left[other]) & (name << (31 - bit) >> 31);
        PICK
        found[beam] = left[0];
    }
    memcpy(to, found, sizeof found);
}

/* Smaller keys to `low`, larger ones to `high`. */
ALWAYS void exchange(int *low, int *high) {
    EACH_LANE {
        int one = low[lane], other = high[lane];
        low[lane] = one < other ? one : other;
        high[lane] = one < other ? other : one;
    }
}

/* Ascending; SORT is a network of exchanges that kernel.py writes for this number of beams. */
ALWAYS void sort(Ints *keys) {
    (void)keys;
#define EXCHANGE(low, high) exchange(keys->at[low], keys->at[high]);
    SORT
}

/* The BEAMS cheapest of two codes for each beam: candidate 2 * beam is its nearest code, 2 * beam
   + 1 the second nearest. A cost is not negative, so that its bits sort as integers do. */
ALWAYS void choose(Floats *cost, Ints *which, const Floats *exact, const float *step, float weight,
                   Grid grid) {
    Ints first, second;
    EACH_BEAM EACH_LANE {
        float value = exact->at[beam][lane];
        float near = nearest(value, grid), far = second_nearest(value, near, grid);
        float lost = (value - near) * step[lane], more = (value - far) * step[lane];
        float least = cost->at[beam][lane] + weight * (lost * lost);
        float other = cost->at[beam][lane] + weight * (more * more);
        other = far == near ? INFINITY : other;
        first.at[beam][lane] = (bits_of(least) & ~NAME) | (2 * beam);
        second.at[beam][lane] = (bits_of(other) & ~NAME) | (2 * beam + 1);
    }
    sort(&first);
    sort(&second);
    EACH_BEAM EACH_LANE {
        int one = first.at[beam][lane], other = second.at[BEAMS - 1 - beam][lane];
        int key = one < other ? one : other;
        cost->at[beam][lane] = float_of(key & ~NAME);
        which->at[beam][lane] = key & NAME;
    }
}

/* What one call works on, for LANES outputs. */
typedef struct {
    Row target[MOST_ROWS], step[MOST_ROWS];
    Floats ahead[MOST_ROWS], code[MOST_ROWS];
    Ints parent[MOST_ROWS]; /* the beam before the row that each beam after it goes on from */
    Floats residual[STRIP], path[STRIP];
    Floats cost;
} Race;

ALWAYS void add(Floats *to, float factor, const Floats *from) {
    EACH_BEAM *(Lanes *)to->at[beam] += factor * *(const Lanes *)from->at[beam];
}

/* Round one row of every beam, and let the rows before it, as far as `start`, make up for it. */
ALWAYS void round_row(Race *race, int row, int start, const float *correction, long stride,
                      float importance, Grid grid) {
    const float *step = race->step[row].at, *target = race->target[row].at;
    Floats exact, *code = &race->code[row], *residual = &race->residual[row - start];
    Ints which, *parent = &race->parent[row];
    EACH_BEAM EACH_LANE exact.at[beam][lane] = race->ahead[row].at[beam][lane] * (1 / step[lane]);
    if (BEAMS > 1) {
        choose(&race->cost, &which, &exact, step, importance, grid);
        EACH_BEAM EACH_LANE parent->at[beam][lane] = which.at[beam][lane] >> 1;
        pick(&exact, &exact, parent);
    }
    EACH_BEAM EACH_LANE {
        float value = exact.at[beam][lane], near = nearest(value, grid);
        float far = second_nearest(value, near, grid);
        float taken = BEAMS > 1 && (which.at[beam][lane] & 1) ? far : near;
        code->at[beam][lane] = taken;
        residual->at[beam][lane] = target[lane] - taken * step[lane];
    }
    for (int other = start; other < row; other++) {
        Floats *ahead = &race->ahead[other];
        if (BEAMS > 1) pick(ahead, ahead, parent);
        add(ahead, correction[other * stride + row], residual);
    }
}

/* Let the rows before a strip make up for all of its rows at once. */
ALWAYS void leave_strip(Race *race, int start, int stop, const float *correction, long stride) {
    Ints origin;
    EACH_BEAM EACH_LANE origin.at[beam][lane] = beam;
    for (int row = start; row < stop; row++) {
        pick(&race->path[row - start], &race->residual[row - start], &origin);
        if (BEAMS > 1) pick(&origin, &race->parent[row], &origin);
    }
    for (int row = 0; row < start; row++) {
        Lanes sum[BEAMS];
        pick(sum, &race->ahead[row], &origin);
        for (int other = start; other < stop; other++) {
            const Lanes *path = (const Lanes *)race->path[other - start].at;
            float factor = correction[row * stride + other];
            EACH_BEAM sum[beam] += factor * path[beam];
        }
        memcpy(&race->ahead[row], sum, sizeof sum);
    }
}

/* The codes of the cheapest sequence. */
ALWAYS void decide(const Race *race, int rows, float *codes, long outputs, int lanes) {
    int best[LANES] = {0};
    EACH_LANE for (int beam = 1; beam < BEAMS; beam++)
        best[lane] = race->cost.at[beam][lane] < race->cost.at[best[lane]][lane] ? beam : best[lane];
    for (int row = 0; row < rows; row++) {
        for (int lane = 0; lane < lanes; lane++) {
            codes[row * outputs + lane] = race->code[row].at[best[lane]][lane];
            if (BEAMS > 1) best[lane] = race->parent[row].at[best[lane]][lane];
        }
    }
}

/* lookahead.solve_block for the outputs from `first` to `last` of `[rows, outputs]` arrays. */
void solve_block(const float *wanted, const float *target, const float *steps,
                 const float *importance, const float *correction, float *codes, long rows,
                 long outputs, long first, long last, float least, float most) {
    Race race;
    Grid grid = {least, most};
    for (long at = first; at < last; at += LANES) {
        int lanes = last - at < LANES ? last - at : LANES;
        for (int row = 0; row < rows; row++) {
            Row begin = {{0}}, goal = {{0}}, step;
            EACH_LANE step.at[lane] = 1;
            memcpy(&begin, wanted + row * outputs + at, 4 * lanes);
            memcpy(&goal, target + row * outputs + at, 4 * lanes);
            memcpy(&step, steps + row * outputs + at, 4 * lanes);
            race.target[row] = goal;
            race.step[row] = step;
            EACH_BEAM memcpy(race.ahead[row].at[beam], &begin, sizeof begin);
        }
        EACH_BEAM EACH_LANE race.cost.at[beam][lane] = beam ? INFINITY : 0;
        for (int stop = rows, start; stop > 0; stop = start) {
            start = (stop - 1) / STRIP * STRIP;
            for (int row = stop - 1; row >= start; row--)
                round_row(&race, row, start, correction, rows, importance[row], grid);
            leave_strip(&race, start, stop, correction, rows);
        }
        decide(&race, rows, codes + at, outputs, lanes);
    }
}

/* sum_j D_j (w_j - s code_j)^2 over the rows of one group, for each of some scales
   `[points, outputs]`; adds to `errors`, of the same shape. */
void scale_errors(const float *weight, const float *importance, const float *scales, float *errors,
                  long rows, long outputs, long points, long first, long last, float least,
                  float most) {
    Grid grid = {least, most};
    for (long from = 0; from < rows; from += MOST_ROWS) {
        int count = rows - from < MOST_ROWS ? rows - from : MOST_ROWS;
        for (long at = first; at < last; at += LANES) {
            Row part[MOST_ROWS];
            int lanes = last - at < LANES ? last - at : LANES;
            for (int row = 0; row < count; row++) {
                part[row] = (Row){{0}};
                memcpy(&part[row], weight + (from + row) * outputs + at, 4 * lanes);
            }
            for (long point = 0; point < points; point++) {
                Row sum = {{0}}, step;
                EACH_LANE step.at[lane] = 1;
                memcpy(&step, scales + point * outputs + at, 4 * lanes);
                for (int row = 0; row < count; row++) EACH_LANE {
                    float value = part[row].at[lane], one = step.at[lane];
                    float lost = value - nearest(value * (1 / one), grid) * one;
                    sum.at[lane] += importance[from + row] * (lost * lost);
                }
                for (int lane = 0; lane < lanes; lane++)
                    errors[point * outputs + at + lane] += sum.at[lane];
            }
        }
    }
}

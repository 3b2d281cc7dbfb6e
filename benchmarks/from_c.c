/* Time a step of an exported stream and of an ONNX Runtime session, both called from C, in turns.

   program LIBRARY MODEL TURNS [STATE...]: ONNX Runtime's library, a model of one step with the inputs x and STATE..., the
   outputs y and STATE_n..., all float32 of fixed sizes. Prints the microseconds of each turn, "stream session" a line,
   then the largest difference of the outputs after as many steps of both.

   The functions of ONNX Runtime's C API stand in a table whose order is fixed for all versions (onnxruntime_c_api.h,
   OrtApi); those that are needed here are called by their place in it, as its wheel comes without the header. */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "cell.h"

enum { GET_ERROR_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_SESSION_OPTIONS = 10,
       SET_INTRA_OP_NUM_THREADS = 24, SET_INTER_OP_NUM_THREADS = 25, CREATE_TENSOR_WITH_DATA = 49,
       CREATE_CPU_MEMORY_INFO = 69 };
enum { WARNINGS = 2, DEVICE_ALLOCATOR = 0, DEFAULT_MEMORY = 0, FLOAT = 1, MOST_STATES = 2, STEPS_A_TURN = 400 };

typedef struct { void **(*table)(uint32_t version); const char *(*version)(void); } api_base;
typedef void *(*create_env)(int severity, const char *name, void **env);
typedef void *(*create_session)(void *env, const char *path, void *options, void **session);
typedef void *(*create)(void **object);
typedef void *(*set_number)(void *options, int number);
typedef void *(*create_memory_info)(int allocator, int kind, void **info);
typedef void *(*create_tensor)(void *info, void *data, size_t bytes, const int64_t *shape, size_t rank, int type,
                               void **tensor);
typedef void *(*run_session)(void *session, const void *options, const char *const *in_names, void *const *in,
                             size_t in_count, const char *const *out_names, size_t out_count, void **out);

static void **api;

static void check(void *status) {
    if (status) {
        fprintf(stderr, "ONNX Runtime: %s\n", ((const char *(*)(void *))api[GET_ERROR_MESSAGE])(status));
        exit(1);
    }
}

static void *tensor_of(void *info, float *data, const int64_t *shape, size_t rank) {
    size_t count = 1;
    void *tensor;
    for (size_t axis = 0; axis < rank; axis++) count *= (size_t)shape[axis];
    check(((create_tensor)api[CREATE_TENSOR_WITH_DATA])(info, data, count * sizeof(float), shape, rank, FLOAT, &tensor));
    return tensor;
}

static double microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static cell_stream stream;
static float input[CELL_INPUT_SIZE], output[CELL_OUTPUT_SIZE], peer_output[CELL_OUTPUT_SIZE];
static float states[2][MOST_STATES][CELL_OUTPUT_SIZE];
static const char *in_names[1 + MOST_STATES] = {"x"}, *out_names[1 + MOST_STATES] = {"y"};
static char names_after[MOST_STATES][64];
static void *session, *in[2][1 + MOST_STATES], *out[2][1 + MOST_STATES];
static size_t values;

/* Run one step; the states are read from one half of the memory and written to the other. */
static void peer_step(long t) {
    check(((run_session)api[RUN])(session, 0, in_names, in[t & 1], values, out_names, values, out[t & 1]));
}

static void open_session(const char *library, const char *model) {
    void *handle = dlopen(library, RTLD_NOW), *env, *options, *info;
    if (!handle) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    api = ((const api_base *(*)(void))dlsym(handle, "OrtGetApiBase"))()->table(1);
    check(((create_env)api[CREATE_ENV])(WARNINGS, "benchmark", &env));
    check(((create)api[CREATE_SESSION_OPTIONS])(&options));
    check(((set_number)api[SET_INTRA_OP_NUM_THREADS])(options, 1));
    check(((set_number)api[SET_INTER_OP_NUM_THREADS])(options, 1));
    check(((create_session)api[CREATE_SESSION])(env, model, options, &session));
    check(((create_memory_info)api[CREATE_CPU_MEMORY_INFO])(DEVICE_ALLOCATOR, DEFAULT_MEMORY, &info));
    for (int half = 0; half < 2; half++) {
        in[half][0] = tensor_of(info, input, (int64_t[]){1, 1, CELL_INPUT_SIZE}, 3);
        out[half][0] = tensor_of(info, peer_output, (int64_t[]){1, 1, 1, CELL_OUTPUT_SIZE}, 4);
        for (size_t state = 1; state < values; state++) {
            const int64_t shape[] = {1, 1, CELL_OUTPUT_SIZE};
            in[half][state] = tensor_of(info, states[half][state - 1], shape, 3);
            out[half][state] = tensor_of(info, states[1 - half][state - 1], shape, 3);
        }
    }
}

int main(int count, char **arguments) {
    if (count < 4 || count > 4 + MOST_STATES) return 2;
    const int turns = atoi(arguments[3]);
    values = (size_t)count - 3;
    for (size_t state = 1; state < values; state++) {
        in_names[state] = arguments[3 + state];
        snprintf(names_after[state - 1], sizeof names_after[0], "%s_n", in_names[state]);
        out_names[state] = names_after[state - 1];
    }
    open_session(arguments[1], arguments[2]);
    for (int i = 0; i < CELL_INPUT_SIZE; i++) input[i] = (float)sin(1.0 + i);
    cell_init(&stream);
    for (int turn = 0; turn < turns; turn++) {
        const double start = microseconds();
        for (int step = 0; step < STEPS_A_TURN; step++) cell_step(&stream, input, output);
        const double middle = microseconds();
        for (int step = 0; step < STEPS_A_TURN; step++) peer_step(step);
        printf("%.4f %.4f\n", (middle - start) / STEPS_A_TURN, (microseconds() - middle) / STEPS_A_TURN);
    }
    float difference = 0;
    for (int i = 0; i < CELL_OUTPUT_SIZE; i++) difference = fmaxf(difference, fabsf(output[i] - peer_output[i]));
    printf("%g\n", difference);
    return 0;
}

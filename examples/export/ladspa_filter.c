/* A LADSPA plugin of an exported filter: one input, one output, and how much of the filtered sound is heard.

   cc -shared -fPIC -O2 -I<folder of filter.h> ladspa_filter.c filter.a -o fusecell_filter.so
   LADSPA_PATH=. analyseplugin ./fusecell_filter.so */
#include <ladspa.h>
#include <stdlib.h>

#include "filter.h"

enum { INPUT, OUTPUT, MIX, PORTS };
enum { BLOCK = 256 };

typedef struct {
    filter_stream stream; /* first: its alignment is that of the whole */
    float filtered[BLOCK];
    const LADSPA_Data *input, *mix;
    LADSPA_Data *output;
} Filter;

static LADSPA_Handle instantiate(const LADSPA_Descriptor *descriptor, unsigned long rate)
{
    const size_t size = (sizeof(Filter) + FILTER_ALIGNMENT - 1) / FILTER_ALIGNMENT * FILTER_ALIGNMENT;
    Filter *filter = aligned_alloc(FILTER_ALIGNMENT, size);
    (void)descriptor;
    (void)rate; /* the filter was trained for one rate, and sounds higher at another */
    if (filter != NULL)
        filter_init(&filter->stream);
    return filter;
}

static void connect_port(LADSPA_Handle instance, unsigned long port, LADSPA_Data *location)
{
    Filter *filter = instance;
    if (port == INPUT)
        filter->input = location;
    else if (port == OUTPUT)
        filter->output = location;
    else if (port == MIX)
        filter->mix = location;
}

static void activate(LADSPA_Handle instance) { filter_reset(&((Filter *)instance)->stream); }

/* Nothing here allocates, locks or calls the system: it may run in a thread that must answer in time. */
static void run(LADSPA_Handle instance, unsigned long count)
{
    Filter *filter = instance;
    const float mix = *filter->mix;
    for (unsigned long start = 0; start < count; start += BLOCK) {
        const unsigned long length = count - start < BLOCK ? count - start : BLOCK;
        /* By way of a buffer, as hosts may give one and the same for input and output. */
        filter_push(&filter->stream, length, filter->input + start, filter->filtered);
        for (unsigned long at = 0; at < length; at++)
            filter->output[start + at] = (1.0f - mix) * filter->input[start + at] + mix * filter->filtered[at];
    }
}

static void cleanup(LADSPA_Handle instance) { free(instance); }

static const LADSPA_PortDescriptor ports[PORTS] = {
    LADSPA_PORT_INPUT | LADSPA_PORT_AUDIO, LADSPA_PORT_OUTPUT | LADSPA_PORT_AUDIO, LADSPA_PORT_INPUT | LADSPA_PORT_CONTROL
};
static const char *const names[PORTS] = {"Input", "Output", "Mix"};
static const LADSPA_PortRangeHint hints[PORTS] = {
    {0, 0, 0},
    {0, 0, 0},
    {LADSPA_HINT_BOUNDED_BELOW | LADSPA_HINT_BOUNDED_ABOVE | LADSPA_HINT_DEFAULT_MAXIMUM, 0, 1},
};
static const LADSPA_Descriptor descriptor = {
    .UniqueID = 999, /* for development; ladspa.org allots the numbers of published plugins */
    .Label = "fusecell_filter",
    .Properties = LADSPA_PROPERTY_HARD_RT_CAPABLE,
    .Name = "Filter of a recurrent network",
    .Maker = "fusecell",
    .Copyright = "Apache-2.0",
    .PortCount = PORTS,
    .PortDescriptors = ports,
    .PortNames = names,
    .PortRangeHints = hints,
    .instantiate = instantiate,
    .connect_port = connect_port,
    .activate = activate,
    .run = run,
    .cleanup = cleanup,
};

const LADSPA_Descriptor *ladspa_descriptor(unsigned long index) { return index == 0 ? &descriptor : NULL; }

// A libcuda.so.1 without a GPU: memory of the host, work that is done when the call returns, kernels that only
// leave behind what they were launched with. Environment variables make it fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef void* Handle;
typedef uint64_t Address;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NOT_FOUND = 500, NOT_SUPPORTED = 801 };

static int number(const char* variable, int otherwise) {
    const char* text = getenv(variable);
    return text ? atoi(text) : otherwise;
}
static Handle something(void) { return malloc(64); }

// --- the driver and its devices ---------------------------------------------------------------------------------

Result cuDriverGetVersion(int* version) { return *version = number("STUB_VERSION", 13000), OK; }
Result cuInit(unsigned flags) { return number("STUB_INIT", number("STUB_DEVICES", 2) ? OK : NO_DEVICE); }
Result cuDeviceGetCount(int* count) { return *count = number("STUB_DEVICES", 2), OK; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, OK; }
Result cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "Stub %d", device), OK; }
Result cuDeviceTotalMem(size_t* bytes, int device) { return *bytes = 8ull << 30, OK; }
Result cuDeviceGetPCIBusId(char* id, int size, int device) { return snprintf(id, size, "0000:0%d:00.0", device), OK; }
Result cuDeviceCanAccessPeer(int* can, int device, int peer) { return *can = device != peer, OK; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    int capability = number("STUB_CAPABILITY", 90);
    switch (attribute) {
        case 75: return *value = capability / 10, OK;
        case 76: return *value = capability % 10, OK;
        case 16: return *value = 132, OK;         // multiprocessors
        case 97: return *value = 232448, OK;      // shared memory of a block, opted in
        case 81: return *value = 233472, OK;      // of a multiprocessor
        case 38: return *value = 50 << 20, OK;    // second-level cache
        case 115: return *value = number("STUB_POOLS", 1), OK;
        default: return *value = 1, OK;
    }
}

// --- contexts ---------------------------------------------------------------------------------------------------

static char contexts[16];
static __thread Handle current;
Result cuDevicePrimaryCtxRetain(Handle* context, int device) { return *context = &contexts[device], OK; }
Result cuDevicePrimaryCtxRelease(int device) { return OK; }
Result cuCtxSetCurrent(Handle context) { return current = context, OK; }
Result cuCtxGetCurrent(Handle* context) { return *context = current, OK; }
Result cuCtxGetDevice(int* device) { return *device = (int)((char*)current - contexts), OK; }
Result cuCtxPushCurrent(Handle context) { return current = context, OK; }
Result cuCtxPopCurrent(Handle* context) { return *context = current, OK; }
int stub_current_device(void) { return current ? (int)((char*)current - contexts) : -1; }

// --- memory -----------------------------------------------------------------------------------------------------

static size_t taken;
int stub_blocks;
static Result take(Address* address, size_t bytes) {
    if (bytes > (size_t)number("STUB_FREE_MIB", 4096) * (1 << 20) - taken) return OUT_OF_MEMORY;
    char* block;
    if (posix_memalign((void**)&block, 512, bytes + 512)) return OUT_OF_MEMORY;
    *(size_t*)block = bytes;
    taken += bytes, stub_blocks++;
    return *address = (Address)(block + 512), OK;
}
static Result give(Address address) {
    taken -= *(size_t*)(address - 512), stub_blocks--;
    free((void*)(address - 512));
    return OK;
}
Result cuMemPoolCreate(Handle* pool, const void* properties) { return *pool = something(), OK; }
Result cuMemPoolDestroy(Handle pool) { return OK; }
Result cuMemPoolSetAttribute(Handle pool, int attribute, void* value) { return OK; }
Result cuMemPoolGetAttribute(Handle pool, int attribute, void* value) { return *(uint64_t*)value = 0, OK; }
int stub_shared;
Result cuMemPoolSetAccess(Handle pool, const void* map, size_t count) { return stub_shared += (int)count, OK; }
Result cuMemPoolGetAccess(int* flags, Handle pool, void* location) { return *flags = 0, OK; }
Result cuMemAllocFromPoolAsync(Address* a, size_t bytes, Handle pool, Handle stream) { return take(a, bytes); }
Result cuMemFreeAsync(Address address, Handle stream) { return give(address); }
Result cuMemAlloc_v2(Address* address, size_t bytes) { return take(address, bytes); }
Result cuMemFree_v2(Address address) { return give(address); }
Result cuMemAllocHost_v2(Address* a, size_t bytes) { return number("STUB_HOST", 0) ? OUT_OF_MEMORY : take(a, bytes); }
Result cuMemFreeHost(Handle address) { return give((Address)address); }
Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    *free = (size_t)number("STUB_FREE_MIB", 4096) * (1 << 20) - taken;
    return *total = 8ull << 30, OK;
}
Result cuMemcpyAsync(Address dst, Address src, size_t bytes, Handle stream) {
    return memmove((void*)dst, (void*)src, bytes), OK;
}
Result cuMemsetD8Async(Address address, unsigned char byte, size_t bytes, Handle stream) {
    return memset((void*)address, byte, bytes), OK;
}

// --- queues, events, graphs -------------------------------------------------------------------------------------

Result cuStreamCreate(Handle* stream, unsigned flags) { return *stream = something(), OK; }
Result cuStreamCreateWithPriority(Handle* stream, unsigned flags, int priority) { return *stream = something(), OK; }
Result cuStreamDestroy_v2(Handle stream) { return OK; }
Result cuStreamSynchronize(Handle stream) { return number("STUB_SYNC", OK); }
Result cuStreamIsCapturing(Handle stream, int* status) { return *status = 0, OK; }
Result cuStreamGetCtx(Handle stream, Handle* context) { return *context = current, OK; }
Result cuStreamGetCtx_v2(Handle stream, Handle* context, Handle* green) {
    *green = 0;
    return *context = current, OK;
}
Result cuStreamGetPriority(Handle stream, int* priority) { return *priority = 0, OK; }
Result cuStreamGetFlags(Handle stream, unsigned* flags) { return *flags = 1, OK; }
Result cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, OK; }
Result cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) { return OK; }
Result cuEventCreate(Handle* event, unsigned flags) { return *event = something(), OK; }
Result cuEventDestroy_v2(Handle event) { return free(event), OK; }
Result cuEventRecord(Handle event, Handle stream) { return OK; }
Result cuEventSynchronize(Handle event) { return number("STUB_SYNC", OK); }
Result cuEventElapsedTime_v2(float* ms, Handle start, Handle end) { return *ms = 2.f, OK; }
Result cuStreamBeginCapture_v2(Handle stream, int mode) { return mode == 2 ? OK : INVALID_VALUE; }
Result cuStreamEndCapture(Handle stream, Handle* graph) { return *graph = something(), OK; }
Result cuGraphInstantiateWithFlags(Handle* exec, Handle graph, uint64_t flags) { return *exec = something(), OK; }
Result cuGraphDestroy(Handle graph) { return OK; }
Result cuGraphExecDestroy(Handle exec) { return OK; }
int stub_graph_launches;
Result cuGraphLaunch(Handle exec, Handle stream) { return stub_graph_launches++, OK; }

// --- code -------------------------------------------------------------------------------------------------------

Result cuModuleLoadData(Handle* module, const void* image) { return *module = something(), number("STUB_LOAD", OK); }
Result cuModuleGetFunction(Handle* function, Handle module, const char* name) {
    return *function = something(), strcmp(name, "absent") ? OK : NOT_FOUND;
}
Result cuFuncGetAttribute(int* value, int attribute, Handle function) { return *value = 16 * attribute, OK; }
int stub_function_attributes[16];
Result cuFuncSetAttribute(Handle function, int attribute, int value) {
    return stub_function_attributes[attribute] = value, OK;
}

typedef struct { unsigned id, pad; unsigned value[16]; } Attribute;
typedef struct { unsigned grid[3], block[3], shared; Handle stream; Attribute* attributes; unsigned count; } Config;
unsigned stub_launch[16];  // grid, block, shared, number of attributes, cluster, overlap
unsigned char stub_arguments[4096];
int stub_argument_sizes[32];  // what the test says that the kernel takes; ends with 0
Result cuLaunchKernelEx(const Config* config, Handle function, void** arguments, void** extra) {
    memcpy(stub_launch, config, 7 * sizeof(unsigned));
    stub_launch[7] = config->count, stub_launch[8] = stub_launch[9] = 0;
    for (unsigned i = 0; i < config->count; i++) {
        if (config->attributes[i].id == 4) stub_launch[8] = config->attributes[i].value[0];
        if (config->attributes[i].id == 6) stub_launch[9] = config->attributes[i].value[0];
    }
    unsigned char* to = stub_arguments;
    for (int i = 0; stub_argument_sizes[i]; to += stub_argument_sizes[i++]) {
        memcpy(to, arguments[i], stub_argument_sizes[i]);
    }
    return number("STUB_LAUNCH", OK);
}
Result cuTensorMapEncodeTiled(unsigned char* map, int type, unsigned rank, Handle address, const uint64_t* sizes,
                              const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                              int swizzle, int promotion, int fill) {
    if (rank > 5) return INVALID_VALUE;
    memset(map, 0, 128);
    uint64_t* words = (uint64_t*)map;
    words[0] = type, words[1] = (uint64_t)address, words[2] = swizzle, words[3] = sizes[0];
    words[4] = rank > 1 ? strides[0] : 0, words[5] = box[0], words[6] = steps[0];
    return OK;
}

// --- how the bindings find all this -----------------------------------------------------------------------------

Result cuGetErrorName(Result code, const char** name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_STUB";
    return OK;
}
Result cuGetErrorString(Result code, const char** text) { return *text = "an error of the stub", OK; }
// NVRTC asks the driver for this one.
Result cuGetExportTable(const void** table, const void* id) { return NOT_SUPPORTED; }
static Result unknown(void) { return NOT_SUPPORTED; }
Result cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
    static const char* const suffixes[] = {"_v2", "", "WithFlags"};
    Dl_info self;
    dladdr(cuGetProcAddress_v2, &self);
    void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = NULL;
    for (int i = 0; !*function && i < 3; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(library, name);
    }
    if (!*function) *function = (void*)unknown;
    if (status) *status = 0;
    return OK;
}
Result cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}

// Filter a WAV file (16 bits, one channel) by an exported stream, sample by sample:
//
//     ./wav_filter in.wav out.wav
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "filter.hpp"

namespace {

std::uint32_t number(const std::vector<char> &bytes, std::size_t at, int count) {
    std::uint32_t value = 0;
    for (int byte = 0; byte < count; byte++)
        value |= static_cast<std::uint32_t>(static_cast<unsigned char>(bytes.at(at + byte))) << (8 * byte);
    return value;
}

// Find the samples of a WAV file; returns false unless it has 16 bits and one channel.
bool find_samples(const std::vector<char> &bytes, std::size_t &start, std::size_t &size) {
    if (bytes.size() < 12 || std::memcmp(bytes.data(), "RIFF", 4) != 0 || std::memcmp(&bytes[8], "WAVE", 4) != 0)
        return false;
    bool fits = false;
    for (std::size_t at = 12; at + 8 <= bytes.size();) {
        const std::size_t length = number(bytes, at + 4, 4), next = at + 8 + length + length % 2;
        if (std::memcmp(&bytes[at], "fmt ", 4) == 0 && at + 24 <= bytes.size())
            fits = number(bytes, at + 8, 2) == 1 && number(bytes, at + 10, 2) == 1 && number(bytes, at + 22, 2) == 16;
        if (std::memcmp(&bytes[at], "data", 4) == 0) {
            start = at + 8;
            size = std::min(length, bytes.size() - start) / 2 * 2;
            return fits;
        }
        at = next;
    }
    return false;
}

}  // namespace

int main(int count, char **arguments) {
    if (count != 3) {
        std::cerr << "usage: wav_filter in.wav out.wav\n";
        return 2;
    }
    std::ifstream in(arguments[1], std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    std::size_t start = 0, size = 0;
    if (!find_samples(bytes, start, size)) {
        std::cerr << arguments[1] << ": expected a WAV file of 16 bits and one channel\n";
        return 1;
    }
    filter::Stream stream;
    for (std::size_t at = start; at < start + size; at += 2) {
        const auto sample = static_cast<std::int16_t>(number(bytes, at, 2));
        const float y = stream.step({static_cast<float>(sample) / 32768.0f})[0];
        const long rounded = std::lrint(std::fmin(std::fmax(y * 32768.0f, -32768.0f), 32767.0f));
        bytes[at] = static_cast<char>(rounded & 0xff);
        bytes[at + 1] = static_cast<char>((rounded >> 8) & 0xff);
    }
    std::ofstream out(arguments[2], std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return out ? 0 : 1;
}

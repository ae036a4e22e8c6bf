#include "gguf.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>

#include "blocks.hpp"

namespace limbeck {
namespace {

constexpr uint64_t kMostTensors = 1u << 20, kMostKeys = 1u << 16, kLongestName = 1u << 16;
constexpr unsigned kMostDimensions = 4;

template <class T>
T value_at(const uint8_t* data) {
    T value;
    std::memcpy(&value, data, sizeof value);
    return value;
}

// Reads forward through the file and never past its end.
class Reader {
 public:
    Reader(const uint8_t* data, size_t size, const std::string& path)
        : begin_(data), at_(data), end_(data + size), path_(path) {}

    const uint8_t* at() const { return at_; }
    const uint8_t* end() const { return end_; }
    size_t offset() const { return size_t(at_ - begin_); }

    const uint8_t* take(uint64_t bytes, const char* what) {
        if (bytes > uint64_t(end_ - at_)) {
            throw FileError(path_ + " is cut off or damaged: " + what + " at byte " + std::to_string(offset()) +
                            " goes past its end.");
        }
        const uint8_t* found = at_;
        at_ += bytes;
        return found;
    }

    template <class T>
    T number(const char* what) {
        return value_at<T>(take(sizeof(T), what));
    }

    std::string_view text(const char* what) {
        const uint64_t length = number<uint64_t>(what);
        return {reinterpret_cast<const char*>(take(length, what)), size_t(length)};
    }

 private:
    const uint8_t *begin_, *at_, *end_;
    const std::string& path_;
};

bool is_scalar(ValueType type) { return size_of(type) > 0; }

MetaValue read_value(Reader& reader, const std::string& key, const std::string& path) {
    MetaValue value;
    value.type = ValueType(reader.number<uint32_t>("a type"));
    if (value.type == ValueType::array) {
        value.element = ValueType(reader.number<uint32_t>("an array's type"));
        value.count = reader.number<uint64_t>("an array's length");
    } else {
        value.element = value.type;
    }
    value.data = reader.at();
    if (is_scalar(value.element)) {
        const uint64_t size = size_of(value.element);
        if (value.count > uint64_t(reader.end() - reader.at()) / size) {
            throw FileError(path + " is cut off or damaged: " + key + " has " + std::to_string(value.count) +
                            " elements, more than the rest of the file.");
        }
        reader.take(value.count * size, "a value");
    } else if (value.element == ValueType::string) {
        for (uint64_t i = 0; i < value.count; ++i) reader.text("a text");
    } else {
        throw FileError(path + " has a value of unknown type " + std::to_string(uint32_t(value.element)) + " under " +
                        key + ".");
    }
    value.end = reader.at();
    return value;
}

uint64_t times(uint64_t a, uint64_t b, const std::string& what) {
    uint64_t product;
    if (__builtin_mul_overflow(a, b, &product)) throw FileError(what);
    return product;
}

}  // namespace

std::string printable(std::string text) {
    for (char& character : text) {
        if (character < ' ' || character > '~') character = '?';
    }
    return text;
}

MappedFile::MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw FileError(path + " can not be read: " + std::strerror(errno) + ".");
    struct stat found;
    if (fstat(file, &found) != 0 || !S_ISREG(found.st_mode) || found.st_size == 0) {
        close(file);
        throw FileError(path + " is no file, or an empty one.");
    }
    size_ = size_t(found.st_size);
    void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (data == MAP_FAILED) throw FileError(path + " can not be mapped: " + std::strerror(errno) + ".");
    data_ = static_cast<const uint8_t*>(data);
}

MappedFile::~MappedFile() { munmap(const_cast<uint8_t*>(data_), size_); }

void MappedFile::release(const uint8_t* from, size_t bytes) const {
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (uintptr_t(from) + page - 1) / page * page, last = (uintptr_t(from) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

size_t size_of(ValueType type) {
    switch (type) {
        case ValueType::u8:
        case ValueType::i8:
        case ValueType::boolean:
            return 1;
        case ValueType::u16:
        case ValueType::i16:
            return 2;
        case ValueType::u32:
        case ValueType::i32:
        case ValueType::f32:
            return 4;
        case ValueType::u64:
        case ValueType::i64:
        case ValueType::f64:
            return 8;
        default:
            return 0;
    }
}

double number_at(ValueType type, const uint8_t* data) {
    switch (type) {
        case ValueType::u8:
        case ValueType::boolean:
            return double(*data);
        case ValueType::i8:
            return double(value_at<int8_t>(data));
        case ValueType::u16:
            return double(value_at<uint16_t>(data));
        case ValueType::i16:
            return double(value_at<int16_t>(data));
        case ValueType::u32:
            return double(value_at<uint32_t>(data));
        case ValueType::i32:
            return double(value_at<int32_t>(data));
        case ValueType::u64:
            return double(value_at<uint64_t>(data));
        case ValueType::i64:
            return double(value_at<int64_t>(data));
        case ValueType::f32:
            return double(value_at<float>(data));
        case ValueType::f64:
            return value_at<double>(data);
        default:
            return 0;
    }
}

uint64_t bytes_of(uint32_t type, uint64_t count) {
    switch (type) {
        case 0:
            return count * 4;
        case 1:
        case 30:
            return count * 2;
        default:
            if (const BlockType* block = block_type(int(type)))
                return count / uint64_t(block->columns) * uint64_t(block->bytes);
            return 0;
    }
}

const char* type_name(uint32_t type) {
    if (type == 0) return "f32";
    if (type == 1) return "f16";
    if (type == 30) return "bf16";
    const BlockType* block = block_type(int(type));
    return block ? block->name : nullptr;
}

GgufFile::GgufFile(const std::string& path) : path_(path), file_(path) {
    Reader reader(file_.data(), file_.size(), path_);
    if (file_.size() < 4 || std::memcmp(reader.take(4, "the mark"), "GGUF", 4) != 0)
        throw FileError(path + " is no GGUF file.");
    const uint32_t version = reader.number<uint32_t>("the version");
    if (version != 2 && version != 3)
        throw FileError(path + " is of GGUF's version " + std::to_string(version) + "; 2 and 3 are read.");
    const uint64_t tensors = reader.number<uint64_t>("a count"), keys = reader.number<uint64_t>("a count");
    if (tensors > kMostTensors || keys > kMostKeys) {
        throw FileError(path + " is damaged: it says it has " + std::to_string(tensors) + " tensors and " +
                        std::to_string(keys) + " keys.");
    }
    for (uint64_t i = 0; i < keys; ++i) {
        const std::string_view key = reader.text("a key");
        if (key.size() > kLongestName)
            throw FileError(path + " is damaged: a key is " + std::to_string(key.size()) + " bytes long.");
        const std::string name(key);
        values_[name] = read_value(reader, name, path_);
    }
    std::vector<uint64_t> offsets;
    std::vector<TensorInfo> found;
    for (uint64_t i = 0; i < tensors; ++i) {
        TensorInfo info;
        const std::string_view name = reader.text("a tensor's name");
        if (name.size() > kLongestName)
            throw FileError(path + " is damaged: a tensor's name is " + std::to_string(name.size()) + " bytes long.");
        info.name = std::string(name);
        const uint32_t dimensions = reader.number<uint32_t>("a tensor's dimensions");
        if (dimensions == 0 || dimensions > kMostDimensions) {
            throw FileError(path + " is damaged: " + info.name + " has " + std::to_string(dimensions) + " dimensions.");
        }
        uint64_t count = 1;
        for (uint32_t d = 0; d < dimensions; ++d) {
            info.shape.push_back(reader.number<uint64_t>("a tensor's shape"));
            count = times(count, info.shape.back(), path + " is damaged: the shape of " + info.name + " is too large.");
        }
        info.type = reader.number<uint32_t>("a tensor's type");
        offsets.push_back(reader.number<uint64_t>("a tensor's offset"));
        const BlockType* block = block_type(int(info.type));
        if (type_name(info.type) != nullptr) {
            if (count == 0 || count > file_.size() * 8 || (block && info.shape[0] % uint64_t(block->columns) != 0)) {
                throw FileError(path + " is damaged: the shape of " + info.name + " is no " + type_name(info.type) +
                                " tensor's of this file.");
            }
            info.bytes = size_t(bytes_of(info.type, count));
        }
        found.push_back(std::move(info));
    }
    const uint64_t alignment = whole("general.alignment", 32);
    if (alignment == 0 || alignment > (1u << 20) || alignment % 8 != 0) {
        throw FileError(path + " has general.alignment " + std::to_string(alignment) + "; it is a multiple of 8.");
    }
    const uint64_t base = (reader.offset() + alignment - 1) / alignment * alignment;
    for (size_t i = 0; i < found.size(); ++i) {
        TensorInfo& info = found[i];
        if (base > file_.size() || offsets[i] > file_.size() - base || info.bytes > file_.size() - base - offsets[i]) {
            throw FileError(path + " is cut off: " + info.name + " goes past its end.");
        }
        if (offsets[i] % 8 != 0)
            throw FileError(path + " is damaged: " + info.name + " begins at byte " + std::to_string(offsets[i]) + ".");
        info.data = file_.data() + base + offsets[i];
        const std::string name = info.name;
        if (!tensors_.emplace(name, std::move(info)).second)
            throw FileError(path + " is damaged: it has two tensors " + name + ".");
    }
}

uint64_t GgufFile::whole(const std::string& key) const {
    const double value = real(key);
    if (!(value >= 0 && value <= 9.0e15) || value != std::floor(value)) {
        throw FileError(path_ + " has " + key + " " + std::to_string(value) + ", which is no count.");
    }
    return uint64_t(value);
}

double GgufFile::real(const std::string& key) const {
    const auto found = values_.find(key);
    if (found == values_.end()) throw FileError(path_ + " has no " + key + ", which its architecture needs.");
    if (!is_scalar(found->second.type)) throw FileError(path_ + " has no number under " + key + ".");
    return number_at(found->second.type, found->second.data);
}

bool GgufFile::truth(const std::string& key, bool otherwise) const { return has(key) ? real(key) != 0 : otherwise; }

std::string GgufFile::text(const std::string& key) const {
    const auto found = values_.find(key);
    if (found == values_.end() || found->second.type != ValueType::string)
        throw FileError(path_ + " has no text under " + key + ".");
    const uint64_t length = value_at<uint64_t>(found->second.data);
    return std::string(reinterpret_cast<const char*>(found->second.data + 8), size_t(length));
}

std::vector<double> GgufFile::numbers(const std::string& key) const {
    const auto found = values_.find(key);
    if (found == values_.end()) throw FileError(path_ + " has no " + key + ", which its architecture needs.");
    const MetaValue& value = found->second;
    if (!is_scalar(value.element) || value.count > 65536)
        throw FileError(path_ + " has no list of numbers under " + key + ".");
    std::vector<double> result;
    for (uint64_t i = 0; i < value.count; ++i)
        result.push_back(number_at(value.element, value.data + i * size_of(value.element)));
    return result;
}

const TensorInfo* GgufFile::find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace limbeck

# find_package(dsc_split 0.1 CONFIG REQUIRED [COMPONENTS load])
include("${CMAKE_CURRENT_LIST_DIR}/dsc_splitTargets.cmake")

set(dsc_split_load_FOUND FALSE)
if(TARGET dsc_split::load)
  set(dsc_split_load_FOUND TRUE)
endif()

foreach(_dsc_split_component IN LISTS dsc_split_FIND_COMPONENTS)
  if(dsc_split_FIND_REQUIRED_${_dsc_split_component} AND NOT dsc_split_${_dsc_split_component}_FOUND)
    set(dsc_split_FOUND FALSE)
    if(_dsc_split_component STREQUAL "load")
      set(dsc_split_NOT_FOUND_MESSAGE "the component 'load' needs nlohmann/json, which was not found. Install it, or \
name the folder that has nlohmann/json.hpp with -Ddsc_split_JSON_INCLUDE_DIR=FOLDER.")
    else()
      set(dsc_split_NOT_FOUND_MESSAGE "unknown component '${_dsc_split_component}'; there is 'load'.")
    endif()
  endif()
endforeach()
